"""What a server tells about itself over HTTP: metrics, loads, the live page's figures, profiles."""
