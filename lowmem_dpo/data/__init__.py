"""From files to preferences: rows, formats, messages."""
