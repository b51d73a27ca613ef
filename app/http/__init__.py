"""HTTP: the application, its routes and schemas, and a request from its handler's side."""
