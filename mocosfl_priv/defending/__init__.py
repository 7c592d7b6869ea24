"""Building blocks shared by defenses: noise, a simulated attacker to train against, and experts."""
