"""Reports: run notebooks with parameters and render them, their figures and the verdicts as self-contained HTML pages."""
