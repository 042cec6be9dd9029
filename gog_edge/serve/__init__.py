"""HTTP and the kiosk page."""
