"""Open files: handles, mapped memory, spans with checksums; files of one folder, opened together."""
