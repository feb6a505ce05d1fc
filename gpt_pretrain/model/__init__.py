"""The GPT and its parts: attention, MLP, norms, positions, interventions at the hook sites, loss, sampling."""
