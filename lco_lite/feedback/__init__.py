"""From responses to advantages: what a response is worth (``rewards``), and by how much that, or the reward model's
hidden states, beats what was to be expected (``advantages``)."""
