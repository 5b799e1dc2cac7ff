"""All plots, drawn with matplotlib, which is the extra ``[report]``. They draw what they are given."""
