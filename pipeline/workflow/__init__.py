"""What the Snakefile needs beside its rules: configuration files, tracked code, and an orderly start after a kill."""
