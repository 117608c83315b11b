"""How a cluster behaves over weeks and months: failures, recovery, goodput, build-out, power and cost."""
