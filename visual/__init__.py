"""Pictures of what a policy has learned: what they show, how they look, the page they stand on."""
