// Draws the charts whose specifications are in the page; vega.js has been loaded before.
addEventListener('DOMContentLoaded', () => document.querySelectorAll('.gs-vega').forEach(div => {
  const spec = JSON.parse(div.firstElementChild.textContent)
  vegaEmbed(div, spec, {actions: false}).catch(e => { div.textContent = `This chart cannot be drawn: ${e.message}` })
}))
