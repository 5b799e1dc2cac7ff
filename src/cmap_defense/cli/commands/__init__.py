"""The commands and their options. Nothing here imports torch: what a command does is imported when it runs."""
