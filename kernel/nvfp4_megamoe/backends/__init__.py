"""One folder per architecture behind the protocol in ``protocol.py``; ``select.py`` chooses between them."""
