"""What a run shows: log, progress, summary, drawings, report.html."""
