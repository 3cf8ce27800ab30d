"""Scripts that measure the toolkit itself: time and memory, each run in processes of its own."""
