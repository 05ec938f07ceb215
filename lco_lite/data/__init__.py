"""What is a model trained on? Files, hub sets and a task's items become demonstrations, preferences and prompts."""
