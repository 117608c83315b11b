"""How a run behaves, by calculation."""
