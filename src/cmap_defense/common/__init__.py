"""Basics that all packages share: settings and options, files, noise, input validation, statistics."""
