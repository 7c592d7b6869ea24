"""What results say: rows with intervals, comparisons, verdicts, and sentences about them."""
