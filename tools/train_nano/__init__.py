"""Training of vericache-nano, the small Llama model that ships with the repository."""
