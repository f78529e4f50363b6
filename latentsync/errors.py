"""The one exception that a user is meant to read."""


class UserError(Exception):
    """What the user can put right: one sentence that names the file or setting and the remedy.

    The command line prints it and exits with code 2; the page shows it. It never carries a traceback.
    """
