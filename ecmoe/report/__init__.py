"""Pages: notebooks run with parameters, their figures, verdicts and the scoreboard, as HTML that sends no request."""
