"""A small HTTP server: images in, poses in pixels out, and one page to try it. `pip install "hpetr[serve]"`."""
