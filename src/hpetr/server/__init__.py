"""An HTTP server: images in, poses in pixels out, and a page to try it. Needs the extra `serve`."""
