"""The report: one self-contained HTML page about a run (`page`), and the charts that notebooks share (`charts`)."""
