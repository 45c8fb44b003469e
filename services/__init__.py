"""The processes of the fleet, a folder a service, and the command line."""
