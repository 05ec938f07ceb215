"""How does what a stage made leave its run? ``forms.py`` writes it, ``card.py`` says what it is."""

FORMS = ("adapter", "merged", "gguf", "gguf-lora", "ollama")
