"""`python -m modelworks` is `modelworks`."""

from modelworks.cli import main

main()
