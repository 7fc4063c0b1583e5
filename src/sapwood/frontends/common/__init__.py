"""What every dialect needs: bodies, fields, errors, event streams and the services behind them."""
