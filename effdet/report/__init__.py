"""What a run shows: log, summary, drawings, report.html."""
