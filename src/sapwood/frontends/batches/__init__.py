"""Offline jobs: files of requests, answered beside the live traffic; also `sapwood generate`."""
