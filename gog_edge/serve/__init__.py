"""The HTTP server: application, worker pool, supervisor, and the kiosk page."""
