"""What is timed, against whom, and how it is reported."""
