"""What builds, checks and lists wheels; run from the checkout: python -m scripts.wheels.build."""
