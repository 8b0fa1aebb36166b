"""Download the file behind a URL, only from allowed addresses and with fair scheduling among hosts.

download.py limits redirects, size and time, and retries. guard.py connects, and checks each address. machine.py detects
faults of this machine, such as a missing network.
"""
