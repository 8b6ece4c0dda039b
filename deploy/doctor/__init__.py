"""What `numoe doctor` looks at: a file for each part of a host, and a `Check` for each line."""
