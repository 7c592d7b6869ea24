"""One experiment: its plan, its trainings, attacks on them, and the record that a run leaves behind."""
