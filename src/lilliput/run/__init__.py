"""How a plan is carried out: drivers of the verbs, journal, delivery."""
