"""Files for trainers and evaluators: the judged groups, their splits without leaks, and the formats."""
