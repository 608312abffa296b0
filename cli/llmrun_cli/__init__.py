"""The command line: one file per noun; talks HTTP to control."""
