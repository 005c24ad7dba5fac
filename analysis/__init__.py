"""From run directories to the paper: ingest, frame, stats, tables, figures."""
