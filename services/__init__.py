"""The processes of the fleet, one folder per service, and the command line."""
