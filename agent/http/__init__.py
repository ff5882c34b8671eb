"""The HTTP port: authentication, bounded bodies, status codes. It decides nothing about alerts or incidents."""
