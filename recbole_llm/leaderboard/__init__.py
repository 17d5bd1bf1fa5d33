"""Many runs beside each other: suites, statistics, tables, reports, the search for settings."""
