"""The checks of an audit: functions from a `Survey` to a `Check`, by what they look at."""
