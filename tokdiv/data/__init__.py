"""DATA: what the user names, as a source of images; decoded and batched in threads."""
