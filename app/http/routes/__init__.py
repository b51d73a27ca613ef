"""The routes: handlers of a few lines over `app.http.service`."""
