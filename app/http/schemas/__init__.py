"""What goes over the wire: the bodies that clients send and get."""
