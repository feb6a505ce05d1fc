"""The GPT and its parts: attention, MLP, norms, positions, perturbations at the hook sites, loss, sampling."""
