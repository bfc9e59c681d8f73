// Excerpts in search results are fetched, which a browser refuses where the site is opened as files; the results are found all the same.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false
