"""Parts of pages: what a page of ``views`` shows, one module per page, and the tables that several pages share."""
