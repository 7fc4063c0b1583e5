"""Logs, metrics, traces and profiles."""
